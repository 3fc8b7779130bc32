"""What looks in from the side: traces, pictures of a store, built-in models, the machine a figure was taken on."""
