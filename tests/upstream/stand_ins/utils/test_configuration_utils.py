config_common_kwargs = {}  # ConfigTester checks the values of these keyword arguments
