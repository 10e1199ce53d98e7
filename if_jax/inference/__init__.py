"""Drawing with a finished cascade."""
