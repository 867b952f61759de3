"""What a linear operator is: spaces, the contract, algebra and closed forms. Knows nothing of neural networks."""
