"""Data on disk and in windows: footage, arrays, features and annotations of videos."""
