"""What a finished model is worth.

The verb `evaluate`: a converted model and its base draw the same prompts, and measures compare what they drew. The verb
`benchmark`: both are timed in turn.
"""
