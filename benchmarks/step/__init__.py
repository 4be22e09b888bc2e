"""What a step costs one worker: its parts, in `fit`, and its bytes."""
