"""Data on disk and in windows: annotations and features of videos, read strictly and streamed."""

from grjca.data.layout import composed, folds
from grjca.data.videos import Inspection, SplitSummary, Video, load, problems
from grjca.data.windows import WindowDataset, stitch, windows

__all__ = [
    "Inspection",
    "SplitSummary",
    "Video",
    "WindowDataset",
    "composed",
    "folds",
    "load",
    "problems",
    "stitch",
    "windows",
]
