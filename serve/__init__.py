"""raysft's serving application: adapter versions in, a chat endpoint out."""
