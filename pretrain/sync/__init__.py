"""A silo's side of the outer step."""
