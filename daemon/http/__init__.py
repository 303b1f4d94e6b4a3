"""The HTTP API: routes, tokens, limits, forwarding to the holder, peers.

Never lives here: a decision about the lease, or anything that outlives a request.
"""
