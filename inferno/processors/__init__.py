"""Ready-made pre- and postprocessing for common models; packages name it in `processor`."""
