"""Mathematics problems, and a contained interpreter for the code that the model writes to solve them."""
