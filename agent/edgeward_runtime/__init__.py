"""Where inputs come from, how they are prepared, and how a model runs on them."""
