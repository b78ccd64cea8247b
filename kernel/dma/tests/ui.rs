//! Programs that break an ownership rule do not compile: one file each in `ui/`, whose first line says which rule.

#[test]
fn programs_that_break_an_ownership_rule_do_not_compile() {
    trybuild::TestCases::new().compile_fail("tests/ui/*.rs");
}
