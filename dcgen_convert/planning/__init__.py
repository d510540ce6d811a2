"""What a conversion will cost, from configs alone: no weights, no GPU, no torch."""
