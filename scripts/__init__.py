"""Scripts that set up, try and measure."""
