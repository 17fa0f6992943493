"""What a configuration will need, computed before anything is started."""
