"""svd_ds: train Stable Video Diffusion (arXiv 2311.15127), ZeRO-3 sharded, in all the paper's stages."""
