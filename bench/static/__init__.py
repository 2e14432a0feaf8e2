"""What is known of the kernels without a GPU, and the smallest case of each."""
