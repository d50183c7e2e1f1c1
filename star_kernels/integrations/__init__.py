"""Other people's models on star_kernels' operators. Nothing here is imported until it is asked for."""
