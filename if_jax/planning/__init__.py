"""Whether a recipe fits a TPU slice, how fast it trains there and what it costs, by the TPU compiler without a TPU."""
