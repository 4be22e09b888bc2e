"""The plan of a training: predicted seconds of a step by each method."""
