"""Callbacks for `model.fit`, and loading."""
