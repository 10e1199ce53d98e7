"""Files of a model: training runs, releases and the tables of weight names."""
