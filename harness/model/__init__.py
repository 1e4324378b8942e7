"""What is trained: network, loss, optimizer."""
