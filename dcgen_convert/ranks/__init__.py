"""The processes of one job: starting them, joining them, sharing work among them."""
