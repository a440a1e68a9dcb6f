"""How shards of work are handed out: `local` in this process or in several, `ray` on a cluster.

Whoever makes a shard commits it itself, and a commit is idempotent: work may be handed out twice, be lost with a
worker and be handed out again; each shard is committed exactly once.
"""
