"""Training pictures: drawn scenes, dataset builders and the batch pipeline."""
