//! Every backend keeps the same promises.

#![allow(clippy::unwrap_used)]

mod fake {
    use nwfilter_rules::{Fake, Process};
    use nwfilter_testlab::backend_contract;
    use nwfilter_testlab::contract::Contract;

    fn fake(check: fn(&Contract<'_>)) {
        let fake = Fake::new();
        let somebody = Process { name: "nft".into(), id: 7 };
        check(&Contract { backend: &fake, host: None, lose: &|port| fake.lose(port, &somebody) });
    }

    backend_contract!(fake);
}

mod xtables {
    use nwfilter_testlab::contract::Contract;
    use nwfilter_testlab::{Host, Need, backend_contract, skip_unless};
    use nwfilter_xtables::Xtables;

    fn xtables(check: fn(&Contract<'_>)) {
        skip_unless!(Need::Root, Need::Tool("ip"), Need::Tool("iptables"), Need::Tool("ebtables"));
        let (host, backend) = (Host::new().unwrap(), Xtables::default());
        let lose = |port: &_| drop(host.run(&["iptables", "-F", &format!("FI-{port}")]).unwrap());
        check(&Contract { backend: &backend, host: Some(&host), lose: &lose });
    }

    backend_contract!(xtables);
}
