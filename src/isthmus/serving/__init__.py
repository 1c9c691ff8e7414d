"""A model behind OpenAI's protocol: an engine that batches as requests come and go, and the HTTP in front of it."""
