"""How shards of work are handed out."""
