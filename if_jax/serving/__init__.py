"""A server that draws: requests that wait together in one program, and pictures that depend on none of the others."""
