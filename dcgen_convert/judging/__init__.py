"""The verb `evaluate`: a converted model and its base draw the same prompts, and measures compare what they drew."""
