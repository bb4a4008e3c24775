"""Scripts that measure: learning curves, plots, speed. The package never imports them."""
