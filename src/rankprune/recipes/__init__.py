"""Complete training recipes: data, networks, one loop, experiments. They need the extra "recipes"."""
