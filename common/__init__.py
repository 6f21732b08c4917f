"""What every role shares: config, messages, transport, pure state machines, the broker, tasks, tracking."""
