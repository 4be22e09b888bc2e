"""Times of what a step is made of: selecting, writing, joining entries."""
