"""Which problems are posed, and why: one TOML file a suite, data alone. harness/run/suite.py reads them."""
