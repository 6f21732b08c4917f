"""The learner: owns prompts, tickets and weights; turns scored groups into policy updates."""
