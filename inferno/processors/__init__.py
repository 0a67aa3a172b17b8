"""Pre- and post-processing that packages name in `processor`, for models of widespread layouts."""
