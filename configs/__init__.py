"""Recipe configs; `pact ls` lists them."""
