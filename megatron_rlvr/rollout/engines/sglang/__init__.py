"""The rollout engine on SGLang servers: server processes, a client, and weight updates."""
