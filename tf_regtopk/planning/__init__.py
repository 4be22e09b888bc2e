"""The plan of a training: what a step of each way to exchange takes."""
