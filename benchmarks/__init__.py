"""What the project costs and how fast it is, measured; each script prints its figures."""
