"""What the plain-torch implementations are made of: the algorithms, and the counted memory they can run on."""
