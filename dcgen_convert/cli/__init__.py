"""The command line: verbs, their options, and how an invocation speaks and ends."""
