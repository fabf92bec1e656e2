"""Training and evaluation of audio-visual models with the fused block of grjca_kernels."""
