"""The stages of a conversion in the order of `conversion.walk`, one module each. The only room that knows `Job`."""
