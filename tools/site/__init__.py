"""What this cluster is and allows, asked of the cluster itself."""
