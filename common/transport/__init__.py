"""ZeroMQ with CURVE: keys, sockets and the client every role talks to the broker with."""
