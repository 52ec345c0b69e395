"""From episodes to minibatches."""
