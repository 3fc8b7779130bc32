"""Which of several replicas a prompt goes to: to the one that holds its longest prefix. No torch, no network.

`names` gives prefixes names that tell nothing of their tokens, `digest` is what a replica says of its tree, `index`
what is known of all replicas, and `router` decides. `fleet` is how replicas are simulated.
"""
