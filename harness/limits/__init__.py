"""How far from the limit: what a device can do, what a problem costs at least, and what it moves."""
