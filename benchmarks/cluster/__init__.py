"""Steps over networks of different speed, beside dense and PyTorch's."""
